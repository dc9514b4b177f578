# What an operator types at the server, once for the agent and once for each workload.
# Runs at each `docker-compose up`, also when all is there already.
set -eu
umask 027  # for the agent, which is in our group, and for nobody else

# By the bundle the agent knows the server.  By the token the server knows the agent: good for
# one join within ten minutes, and for an agent that was away for longer than its SVID lived.
# An agent that is known to the server takes no notice of it, and it is forgotten.
issuer bundle show > /srv/spiffe-issuer/bundle.pem
token=$(issuer token generate --spiffe-id spiffe://example.org/node)
echo "${token#Token: }" > /srv/spiffe-issuer/join-token

# NAME UID: who runs as this user on the agent's machine is spiffe://example.org/NAME.
is_user() {
    verb=create
    if issuer entry show --entry-id "$1" > /dev/null 2>&1; then verb=update; fi
    issuer entry "$verb" --entry-id "$1" --spiffe-id "spiffe://example.org/$1" \
        --parent-id spiffe://example.org/node --selector "unix:uid:$2"
}

is_user web 10011
is_user api 10012
is_user batch 10013
