"""Export a model to a file that runs without this library, and compare it with torch before it is called done. The
manifest (NAME.onnx.json), config.json and the tokenizer go to the same folder.

  fastkd export MODEL --to onnx --out edge/model.onnx
  fastkd export MODEL --to onnx --int8 --out edge/model-int8.onnx
  fastkd export MODEL --to openvino --int8 --texts train.parquet --out edge/model.xml

Exit status 1: the file differs from torch by more than is allowed, and is kept as NAME.refused.onnx.
"""

import sys


def add_arguments(parser) -> None:
    from fastkd.edge.export_run import TARGETS

    parser.add_argument("model", metavar="MODEL", help="a folder or hub id: classifier, regressor or sentence encoder")
    parser.add_argument("--out", required=True, metavar="FILE", help="NAME.onnx, NAME.xml, NAME.pt2 or NAME.pte")
    parser.add_argument("--to", choices=TARGETS, default="onnx", help="format (default: onnx)")
    parser.add_argument("--int8", action="store_true", help="matrices and embedding rows in int8 (onnx, openvino)")
    parser.add_argument(
        "--texts", "--calibration", action="append", default=[], metavar="PATH",
        help="parquet, txt, json(l), folder, hub id: more to compare on, and what int8 for openvino is calibrated on",
    )  # fmt: skip
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of parquet and json (default: text)")
    parser.add_argument(
        "--max-length", type=int, default=128, metavar="N", help="tokens to calibrate on (default: 128)"
    )
    parser.add_argument(
        "--max-difference", type=float, metavar="SHARE",
        help="from torch, of the largest number it gives (default: 1e-4, int8: 0.25)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file")


def run(options) -> int:
    from fastkd.edge.export_run import Export, RefusedError

    try:
        Export(**vars(options)).run()
    except RefusedError as error:
        print(f"fastkd export: {error}", file=sys.stderr)
        return 1
    return 0
