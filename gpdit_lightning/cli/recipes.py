"""`recipes`: list or copy the recipes that ship with the package."""

import shutil

from gpdit_lightning.cli.recipe_files import SHIPPED, recipes_folder, shipped_recipes
from gpdit_lightning.errors import InputError
from gpdit_lightning.options.recipes import RecipesOptions


def recipes(options: RecipesOptions) -> None:
    """List the shipped recipes, or copy them.

    Raises:
        InputError: the folder to copy to is not empty.
    """
    folder = recipes_folder()
    if options.out is None:
        names = {path: path.relative_to(folder).with_suffix("").as_posix() for path in shipped_recipes()}
        width = max(map(len, names.values()))
        for path, name in names.items():
            title = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
            print(f"{SHIPPED}{name:<{width}}  {title}")
        return
    if options.out.exists() and any(options.out.iterdir()):
        raise InputError(f"{options.out} is not empty: choose another --out.")
    shutil.copytree(folder, options.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    print(f"{options.out}: {len(shipped_recipes())} recipes; python -m gpdit_lightning fit --config {options.out}/...")
