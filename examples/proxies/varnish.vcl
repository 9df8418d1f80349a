# Varnish 7 in front of two nodes, behind hitch (hitch.conf) for TLS. docs/proxies.md explains each
# line. Varnish caches nothing of Pointsman; this is for sites that have Varnish in front already.
#
# varnishd -f /etc/varnish/varnish.vcl -a 127.0.0.1:6086,PROXY -p feature=+http2
#   -p http_req_hdr_len=40k -p http_req_size=64k
#
# Change: the addresses of the nodes.
# In pointsman.toml: listen.trusted_proxies = ["ADDRESS OF THIS MACHINE", "127.0.0.1"]

vcl 4.1;

import directors;
import std;

# between_bytes_timeout: longer than stream.heartbeat_interval (20 s). Without a probe, Varnish tries
# a node again at once.
backend node1 {
    .host = "10.0.0.11:8080";
    .connect_timeout = 2s;
    .between_bytes_timeout = 60s;
}
backend node2 {
    .host = "10.0.0.12:8080";
    .connect_timeout = 2s;
    .between_bytes_timeout = 60s;
}

sub vcl_init {
    new nodes = directors.shard();
    nodes.add_backend(node1);
    nodes.add_backend(node2);
    nodes.reconfigure();
}

sub vcl_recv {
    # The body is kept for a second attempt; limits.batch_bytes is 4 MiB.
    if (req.method == "POST" || req.method == "PUT") {
        std.cache_req_body(5MB);
    }
    # In front of a node in dev mode: set req.http.Host = "localhost";
    return (pass);
}

sub vcl_backend_fetch {
    # By the user; "alt", so that a second attempt takes another node, as round_robin may not.
    set bereq.backend = nodes.backend(
        by = KEY,
        key = nodes.key(bereq.http.X-Forwarded-For + bereq.http.Cookie + bereq.http.Authorization),
        alt = bereq.retries
    );
}

sub vcl_backend_response {
    # From Varnish 7.2, so that a client that reads slowly does not fill the memory of Varnish:
    # set beresp.transit_buffer = 64KB;
    set beresp.do_stream = true;
}

sub vcl_backend_error {
    # A connection that a node refuses goes to another node.
    if (bereq.retries == 0) {
        return (retry);
    }
    # An EventSource never reconnects after another status than 200.
    if (bereq.url ~ "^/v1/stream(\?|$)") {
        set beresp.status = 200;
        set beresp.http.Content-Type = "text/event-stream";
        set beresp.http.Cache-Control = "no-store";
        synthetic({"retry: 2000

"});
        return (deliver);
    }
}
