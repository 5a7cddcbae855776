"""What each command can be asked for: one record of typed, documented fields for each verb.

A record is both the command line of its verb and its interface from Python:

    from gpdit_lightning.cli.export import export
    from gpdit_lightning.options.export import ExportOptions

    export(ExportOptions(checkpoint="runs/demo/stage3_long_video", out=Path("model")))

Verbs share options by inheritance. Each record that a verb inherits from is one group of its `--help`, with the first
line of the record's docstring as the title; a field's docstring is its help. These modules import neither torch nor
Lightning, so that `--help` answers at once.
"""
