"""Planted bugs: applied one at a time to a scratch copy, built, and run against the tests.

``patches`` and ``generate`` make the mutants, ``scratch`` copies and builds, ``trial`` runs the
checks on one mutant and asks for evidence that it is the mutant which ran, ``command`` is the
command line. ``witness`` and ``outputs`` run inside the tested process.
"""
