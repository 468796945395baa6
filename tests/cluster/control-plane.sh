# Certificates, etcd and the Kubernetes control plane. Sourced by `node` (the whole cluster) and by `apiserver`
# (etcd and the API server alone), after lib.sh.
# shellcheck shell=bash

# new_key FILE: ECDSA, because making an RSA key takes most of a second.
new_key() { openssl ecparam -genkey -name prime256v1 -noout -out "$1"; }

# authority PKI NAME: PKI/NAME.crt and .key, a certificate authority.
authority() {
  new_key "$1/$2.key"
  openssl req -x509 -key "$1/$2.key" -days 365 -subj "/CN=turboquant-$2" -out "$1/$2.crt"
}

# certificate PKI NAME SUBJECT [ALTERNATIVE_NAMES]: PKI/NAME.crt and .key, signed by PKI/ca.
certificate() {
  local pki=$1 name=$2
  new_key "$pki/$name.key"
  openssl req -new -key "$pki/$name.key" -subj "$3" |
    openssl x509 -req -days 365 -CA "$pki/ca.crt" -CAkey "$pki/ca.key" -CAcreateserial -out "$pki/$name.crt" \
      -extfile <(printf 'extendedKeyUsage=clientAuth,serverAuth\n%s\n' "${4:+subjectAltName=$4}")
}

# kubeconfig PKI NAME SERVER: print a self-contained kubeconfig for PKI/NAME's certificate.
kubeconfig() {
  cat <<Y
apiVersion: v1
kind: Config
current-context: turboquant
contexts: [{name: turboquant, context: {cluster: turboquant, user: $2}}]
clusters: [{name: turboquant, cluster: {server: "$3", certificate-authority-data: $(base64 -w0 "$1/ca.crt")}}]
users: [{name: $2, user: {client-certificate-data: $(base64 -w0 "$1/$2.crt"), client-key-data: $(base64 -w0 "$1/$2.key")}}]
Y
}

# make_pki PKI ADDRESSES: the certificate authority, and what the control plane and its administrator need.
# ADDRESSES (IP:...,IP:...) are where clients reach the API server.
make_pki() {
  local pki=$1 kubernetes=DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc
  mkdir -p "$pki"
  chmod 700 "$pki"
  authority "$pki" ca
  authority "$pki" front-proxy-ca # the API server must have one, though no API is aggregated
  certificate "$pki" apiserver /CN=kube-apiserver "$2,DNS:localhost,$kubernetes"
  certificate "$pki" apiserver-kubelet-client /O=system:masters/CN=apiserver-kubelet-client
  certificate "$pki" admin /O=system:masters/CN=admin
  certificate "$pki" controller-manager /CN=system:kube-controller-manager
  new_key "$pki/service-account.key"
  openssl pkey -in "$pki/service-account.key" -pubout -out "$pki/service-account.pub"
}

# start_etcd FOLDER DATA CLIENT_PORT PEER_PORT
start_etcd() {
  local peer=http://127.0.0.1:$4 client=http://127.0.0.1:$3
  # Without fsync: a cluster that is thrown away needs no safety from a power cut.
  start "$1" etcd etcd --data-dir "$2" --unsafe-no-fsync --listen-client-urls "$client" \
    --advertise-client-urls "$client" --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
    --initial-cluster "default=$peer"
}

# start_apiserver FOLDER PKI ETCD_PORT ADDRESS PORT FLAGS...: on ADDRESS, which is also the one it advertises.
start_apiserver() {
  local pki=$2
  start "$1" kube-apiserver kube-apiserver --etcd-servers="http://127.0.0.1:$3" --secure-port="$5" \
    --service-cluster-ip-range=10.96.0.0/16 --authorization-mode=Node,RBAC --allow-privileged=true \
    --enable-admission-plugins=NodeRestriction --client-ca-file="$pki/ca.crt" \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$pki/service-account.pub" \
    --service-account-signing-key-file="$pki/service-account.key" \
    --kubelet-certificate-authority="$pki/ca.crt" --kubelet-client-certificate="$pki/apiserver-kubelet-client.crt" \
    --kubelet-client-key="$pki/apiserver-kubelet-client.key" --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file="$pki/front-proxy-ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --advertise-address="$4" "${@:6}"
}

# start_controller_manager FOLDER PKI SERVER FLAGS...
start_controller_manager() {
  local pki=$2 config=$2/controller-manager.kubeconfig
  kubeconfig "$pki" controller-manager "$3" >"$config"
  start "$1" kube-controller-manager kube-controller-manager --kubeconfig="$config" \
    --authentication-kubeconfig="$config" --authorization-kubeconfig="$config" --bind-address=127.0.0.1 \
    --leader-elect=false --use-service-account-credentials=true --root-ca-file="$pki/ca.crt" \
    --service-account-private-key-file="$pki/service-account.key" --cluster-signing-cert-file="$pki/ca.crt" \
    --cluster-signing-key-file="$pki/ca.key" "${@:4}"
}
