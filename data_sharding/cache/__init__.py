"""What a teacher saw, stored once and read by every student."""
