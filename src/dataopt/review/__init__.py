"""``dataopt review``: a page on this machine to decide about suspects, one by one, and the export of the decisions."""
