"""Write a compressed model back as an ordinary checkpoint, which loads without fastkd.

fastkd densify SMALL --out DENSE
"""


def add_arguments(parser) -> None:
    parser.add_argument("model", metavar="SMALL", help="a folder or hub id of a compressed model")
    parser.add_argument("--out", required=True, metavar="DIR", help="the dense model: a new or empty folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands in --out")


def run(options) -> None:
    from fastkd.recipes.sparse_embeddings import densify_folder

    densify_folder(options.model, options.out, overwrite=options.overwrite)
