"""The speed matrix: contenders × runtimes × shapes."""
