"""The parts of `backbone=trc2`: the router between columns, the store of events, the critic that says what is one."""
