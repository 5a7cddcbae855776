"""Puts the recipes, which lie beside the package in a clone, inside the package in a wheel.

Everything else is in pyproject.toml. (Mapping a package onto the folder there would do the same for a wheel, but breaks
editable installs; those find the recipes beside the package: `gpdit_lightning/cli/recipe_files.py`.)
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path("recipes")


class BuildWithRecipes(build_py):
    """The package's modules and, in a wheel, `gpdit_lightning/recipes`."""

    def run(self) -> None:
        """Build, then copy the recipes."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(RECIPES, Path(self.build_lib) / "gpdit_lightning" / RECIPES, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
