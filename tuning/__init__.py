"""Many runs: Ray Tune searches over the dotted settings of a recipe, and their comparison."""
