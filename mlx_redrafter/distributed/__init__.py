"""One model over several machines: how it is cut, how they agree, how they are started and lost."""
