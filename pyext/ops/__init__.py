"""One file per op: reference, derivative, argument checks, sample and error inputs, cost."""
