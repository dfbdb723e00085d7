"""Official metrics on detections, and the speed of a student."""
