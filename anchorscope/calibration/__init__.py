"""From profiles to anchors.json: the groups and the theta of every head."""
