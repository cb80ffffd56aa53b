-- Appends several events of one actor and one moment to a dense hash chain, in their order, and answers the sequence of the
-- last. The contract of engine_append_event_v3 for each of them; the head is read once and moved once.
CREATE FUNCTION engine_append_events_v1(
    p_tenant uuid, p_stream text, p_actor text, p_kinds text[], p_payloads jsonb[]
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_seq    bigint;
    v_prev   bytea;
    v_feed   xid8;
    v_at     timestamptz;
    v_hash   bytea;
    v_text   text;
    v_kind   bytea;
    v_bytes  bytea;
    v_tenant bytea := convert_to(p_tenant::text, 'UTF8');
    v_stream bytea := convert_to(p_stream, 'UTF8');
    v_actor  bytea := convert_to(p_actor, 'UTF8');
BEGIN
    FOR v_try IN 1..2 LOOP
        SELECT last_seq, last_hash, GREATEST(last_position, pg_current_xact_id()) INTO v_seq, v_prev, v_feed
            FROM event_streams WHERE tenant_id = p_tenant AND stream = p_stream FOR UPDATE;
        EXIT WHEN FOUND;
        INSERT INTO event_streams (tenant_id, stream) VALUES (p_tenant, p_stream) ON CONFLICT DO NOTHING;
    END LOOP;
    v_at := clock_timestamp();
    FOR v_each IN 1 .. cardinality(p_kinds) LOOP
        v_seq := v_seq + 1;
        v_text := p_payloads[v_each]::text;
        v_kind := convert_to(p_kinds[v_each], 'UTF8');
        v_bytes := convert_to(v_text, 'UTF8');
        v_hash := sha256(
            int4send(octet_length(v_tenant)) || v_tenant || int4send(octet_length(v_stream)) || v_stream
            || int8send(v_seq) || int4send(octet_length(v_prev)) || v_prev || int4send(octet_length(v_kind)) || v_kind
            || int4send(octet_length(v_actor)) || v_actor || int8send((extract(epoch FROM v_at) * 1000000)::bigint)
            || int4send(octet_length(v_bytes)) || v_bytes);
        INSERT INTO events (tenant_id, stream, seq, prev_hash, hash, kind, actor, occurred_at, payload, feed_position)
            VALUES (p_tenant, p_stream, v_seq, v_prev, v_hash, p_kinds[v_each], p_actor, v_at, v_text, v_feed);
        v_prev := v_hash;
    END LOOP;
    UPDATE event_streams SET last_seq = v_seq, last_hash = v_prev, last_position = v_feed
        WHERE tenant_id = p_tenant AND stream = p_stream;
    RETURN v_seq;
END
$$;
