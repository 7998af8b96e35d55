"""What each command of `qbl-trl` is told and does, in a module for each, which loads packages as it runs."""
