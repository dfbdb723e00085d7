"""What a distilled student is used for: detections in pictures, files for devices."""
