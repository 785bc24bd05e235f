"""The loops that users have: each file forwards to the methods, and needs the library that it is named after."""
