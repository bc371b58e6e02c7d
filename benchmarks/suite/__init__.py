"""What `make bench` runs, by asv."""
