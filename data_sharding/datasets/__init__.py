"""One file per data set format. Each defines `Config`, `class_names(config)` and `records(config, split)`."""
