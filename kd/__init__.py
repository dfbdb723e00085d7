"""The science: detectors, distillation methods, the training step and evaluation; runs without Ray."""
