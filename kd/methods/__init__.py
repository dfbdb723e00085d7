"""One file per published method: `Config` and `Loss`, and `Assistant` where one learns beside the student."""
