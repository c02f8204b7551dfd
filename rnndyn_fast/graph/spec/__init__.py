"""What a network is: areas, connections, the network of both, and their JSON and YAML forms."""
