"""What ranks tell one another: failures, which hooks they have, what they ran, what came out."""
