module local/parcels

go 1.24
