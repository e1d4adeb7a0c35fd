#!/usr/bin/env bash
# Certificates for Ray's own TLS: a private authority, and one certificate that every node and every client carries.
#   cluster/tls.sh DIRECTORY ADDRESS...      all names and addresses at which nodes are reached; again, for more of them
# Keep ca.key off the cluster. Copy the other files to every node and client, and set there:
#   RAY_USE_TLS=1 RAY_TLS_CA_CERT=DIRECTORY/ca.crt
#   RAY_TLS_SERVER_CERT=DIRECTORY/node.crt RAY_TLS_SERVER_KEY=DIRECTORY/node.key
set -euo pipefail
umask 077

mkdir -p "$1"
cd "$1"
shift

names=DNS:localhost,IP:127.0.0.1
for address in "$@"; do
    if [[ $address =~ ^[0-9.]+$ || $address == *:* ]]; then
        names+=",IP:$address"
    else
        names+=",DNS:$address"
    fi
done

if [[ ! -e ca.key ]]; then
    openssl req -x509 -newkey rsa:3072 -nodes -days 1825 -subj /CN=distill-authority -keyout ca.key -out ca.crt
fi
openssl req -newkey rsa:3072 -nodes -subj /CN=distill-node -keyout node.key -out node.csr
openssl x509 -req -in node.csr -CA ca.crt -CAkey ca.key -days 365 -out node.crt \
    -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$names")
rm node.csr
