"""How fast a model trains and answers on this machine, and what follows from that."""
