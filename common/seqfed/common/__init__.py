"""What the server and the clients share: the waist (layout and flat vector), the run's specification, errors, files."""
