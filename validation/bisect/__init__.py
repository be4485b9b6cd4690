"""From the layer that left its band to the node: a stage's layer beside a trusted one, tensor by tensor, each node given exact inputs."""
