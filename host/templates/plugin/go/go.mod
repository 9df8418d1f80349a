module local/my-plugin

go 1.24
