"""What is done to an op: check it, measure it, compare it with the machine, report."""
