"""The machines: recipes, Ray Train, DeepSpeed, checkpoints, MLflow, and every `python -m cluster.<verb>`."""
