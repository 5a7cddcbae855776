"""Options of the commands: one dataclass of typed, documented fields for each verb.

A record of options is both the command line of its verb and its interface from Python:

    from gpdit_lightning.cli.export import export
    from gpdit_lightning.options.export import ExportOptions

    export(ExportOptions(checkpoint="runs/demo/stage3_long_video", out="model"))

Verbs share options by inheritance. Each base class of a record is a group of its `--help`, with the first line of the
docstring as the title; the docstring of a field is its help text. These modules import neither torch nor Lightning, so
that `--help` is fast.
"""
