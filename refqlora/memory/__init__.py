"""Memory: how many bytes everything takes."""
