"""Which weights? Tickets: the type, drawing them, and shrinking a model to one."""
