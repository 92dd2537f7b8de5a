"""What people look at, drawn from plain values and from the files that runs leave: `plots`."""
