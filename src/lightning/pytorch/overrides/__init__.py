"""The documented import path of what distributed runs put in the place of torch's own."""
