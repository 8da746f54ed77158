"""The `fathom` command with the toy stages, pipeline and recipe added to the project's own."""

import sys

import toy

import flows.pipelines
import flows.recipes
import stages

stages.NAMES = (*stages.NAMES, *toy.STAGES)
sys.modules |= {f"stages.{name}": toy for name in toy.STAGES}
sys.modules["flows.recipes.toy"] = toy
flows.pipelines.PIPELINES["toy"] = toy.TOY
flows.recipes.RECIPES = (*flows.recipes.RECIPES, "toy")

if __name__ == "__main__":
    from flows.cli import main

    main()
