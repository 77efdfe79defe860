"""The server side of edge_ll: pre-train a teacher, distil a student, export it as a bundle."""
