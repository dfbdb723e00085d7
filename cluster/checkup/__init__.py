"""What `cluster.doctor` looks at, an area a file."""
