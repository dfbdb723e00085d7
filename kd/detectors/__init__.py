"""One file per detector family. Each defines `Config` and `build(config, num_classes, weights_follow=False)`."""
