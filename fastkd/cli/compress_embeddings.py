"""Compress a model's input embedding: frequent tokens keep their rows, each other row becomes a weighted sum of a few
of them. The result loads with the ordinary from_pretrained after `import fastkd`; the original stays as it is.

  fastkd compress-embeddings MODEL --text train.parquet --keep 0.1 --atoms 8 --out SMALL
  fastkd compress-embeddings MODEL --text train.parquet --budget 12MB --out SMALL
  fastkd compress-embeddings MODEL --eval sst2 --data DIR --max-drop 0.5 --out SMALL

With --budget or --max-drop codes of many settings are fitted and compared. `fastkd densify` goes the way back.
"""


def add_arguments(parser) -> None:
    from fastkd.recipes.sparse_embeddings import FORMATS, METHODS

    parser.add_argument("model", metavar="MODEL", help="a folder or hub id, with any task head")
    parser.add_argument("--out", required=True, metavar="DIR", help="the compressed model: a new or empty folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands in --out")

    text = parser.add_argument_group("where token frequencies come from: one of --text, --eval, --counts, or more")
    text.add_argument(
        "--text", action="append", default=[], metavar="PATH", help="parquet, txt, json(l), folder, hub id"
    )
    text.add_argument("--text-column", default="text", metavar="NAME", help="of parquet and json (default: text)")
    text.add_argument("--max-length", type=int, default=128, metavar="N", help="tokens of a text (default: 128)")
    text.add_argument("--counts", metavar="FILE", help="counts that were saved before")
    text.add_argument("--save-counts", metavar="FILE", help="keep the counts for another time")

    code = parser.add_argument_group("the code")
    code.add_argument("--method", choices=METHODS, default="sparse", help="how rare rows are stored (default: sparse)")
    code.add_argument("--keep", type=float, metavar="SHARE", help="of the rows kept whole (default: 0.1)")
    code.add_argument("--atoms", type=int, metavar="K", help="kept rows that make up a rare one (default: 8)")
    code.add_argument("--rows", choices=FORMATS, help="format of kept rows (default: fp16 for sparse, else int8)")
    code.add_argument("--weights", choices=FORMATS, help="format of the atoms' weights (likewise)")

    budget = parser.add_argument_group("let settings be chosen, instead of --keep and --atoms")
    budget.add_argument("--budget", metavar="BYTES", help="best code of at most so many bytes, e.g. 12MB")
    budget.add_argument("--max-drop", type=float, metavar="POINTS", help="smallest code that loses no more on --eval")
    budget.add_argument("--eval", dest="task", metavar="TASK", help="score on 5 %% held out of a task's train split")
    budget.add_argument("--data", metavar="DIR", help="folder of that task; its usual hub data set by default")


def run(options) -> None:
    from fastkd.recipes.sparse_embeddings import CompressEmbeddings

    CompressEmbeddings(**vars(options)).run()
