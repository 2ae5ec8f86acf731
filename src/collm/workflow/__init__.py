"""From nothing to a result: recipes from presets (`collm init`), and all steps of a recipe at once (`collm run`)."""
