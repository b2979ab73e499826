"""What all export formats share: reports, verification, atomic publication."""
