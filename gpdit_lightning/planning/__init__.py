"""A training recipe that is fitted to prepared data and to a machine."""
