"""Training runs that use the lab's ops, and the data they train on."""
