"""Arguments and files that nobody should give: refused in one sentence, or served rightly."""
