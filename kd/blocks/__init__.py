"""Pure pieces that distillation methods are made of; nothing here knows a method, a detector or a recipe."""
