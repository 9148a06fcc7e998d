"""Planning for several machines: kinds of nodes, one promise over all, what each serves."""
