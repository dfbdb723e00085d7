"""One file per backbone family. Each defines `Config` and `build(config, weights_follow=False)`."""
