"""Run a recipe: a YAML file that is shipped with fastkd, or one's own. `key=value` words override its settings.

  fastkd train arc-sst2 teacher=DIR_OR_HUB_ID data=DIR_OR_HUB_NAME
  fastkd train arc-sst2 teacher=... data=... stage_b.max_steps=4000 output_dir=runs/longer
  fastkd train lrc-bert-4x312-sst2 teacher=... data=... corpus=[DIR_OF_TEXT]
  fastkd train egkd-sst2 teacher=... data=... distil.branches='{gradient: 10, selection: 1}'
  fastkd train my.yaml

The same command again goes on where it was stopped; `overwrite=true` starts anew.
"""


def add_arguments(parser) -> None:
    parser.add_argument("recipe", help="a shipped recipe's name, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. teacher=DIR, stage_a.max_steps=1000")


def run(options) -> None:
    import torch.distributed as dist

    from fastkd.recipes import read_settings, run_recipe

    run_recipe(read_settings(options.recipe, options.settings))
    if dist.is_available() and dist.is_initialized():  # its threads would end an interpreter that exits by abort()
        dist.destroy_process_group()
