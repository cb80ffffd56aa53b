-- Books one decision: refuses, parks on a ticket, or reserves and grants. One call, one transaction.
-- Locks, always in this order: idempotency record, halt scopes, run, ticket, budgets from narrow to wide, grant, stream head.
-- The command `c` is built by storage/postgres; every key it reads is written there.
CREATE FUNCTION engine_admit_v1(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant   uuid := (c ->> 'tenant_id')::uuid;
    v_run_id   uuid := (c ->> 'run_id')::uuid;
    v_command  text := c ->> 'command_id';
    v_step     integer := (c ->> 'step_index')::integer;
    v_attempt  integer := (c ->> 'attempt')::integer;
    v_outcome  text := c #>> '{decision,outcome}';
    v_reason   text := c #>> '{decision,reason}';
    v_message  text := c #>> '{decision,message}';
    v_ticket   approval_tickets;
    v_record   idempotency_records;
    v_halt     jsonb;
    v_state    text;
    v_kind     text;
    v_answer   jsonb;
    v_budget   record;
    v_reserved integer := 0;
    v_refused  record;
    v_expires  timestamptz;
BEGIN
    PERFORM engine_enter_v1(v_tenant);

    INSERT INTO idempotency_records (tenant_id, operation, command_id, digest)
        VALUES (v_tenant, 'admit', v_command, c ->> 'command_digest') ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        SELECT * INTO v_record FROM idempotency_records
            WHERE tenant_id = v_tenant AND operation = 'admit' AND command_id = v_command;
        IF v_record.digest <> c ->> 'command_digest' THEN
            RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
                'command %s was already used for another proposal', v_command);
        END IF;
        RETURN v_record.result || '{"replayed": true}';
    END IF;

    PERFORM engine_lock_halts_v1(v_tenant, v_run_id);
    v_halt := engine_standing_halt_v1(v_tenant, v_run_id);
    PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);

    IF v_halt IS NOT NULL THEN
        v_outcome := 'deny';
        v_reason := 'halted';
        v_message := format('a %s halt stands: %s', v_halt ->> 'scope', v_halt ->> 'reason');
    END IF;

    IF v_outcome = 'ask' AND c ->> 'ticket_id' IS NOT NULL THEN
        SELECT * INTO v_ticket FROM approval_tickets
            WHERE tenant_id = v_tenant AND id = (c ->> 'ticket_id')::uuid AND run_id = v_run_id FOR UPDATE;
        IF v_ticket.id IS NULL OR v_ticket.step_index <> v_step OR v_ticket.digest <> c ->> 'digest'
           OR v_ticket.policy_digest <> c ->> 'policy_digest' OR v_ticket.consumed_at IS NOT NULL THEN
            v_outcome := 'deny';
            v_reason := 'approval_mismatch';
            v_message := 'the approval is for another call, another policy, or was already used';
        ELSIF v_ticket.state IN ('pending', 'approved') AND v_ticket.deadline <= clock_timestamp() THEN
            UPDATE approval_tickets SET state = 'expired'
                WHERE tenant_id = v_tenant AND id = v_ticket.id AND state = 'pending';
            v_outcome := 'deny';
            v_reason := 'approval_expired';
            v_message := format('the approval was good until %s', v_ticket.deadline);
        ELSIF v_ticket.state = 'approved' THEN
            v_outcome := 'allow';
        ELSIF v_ticket.state = 'denied' THEN
            v_outcome := 'deny';
            v_reason := 'approval_denied';
            v_message := COALESCE('denied by the approver: ' || NULLIF(v_ticket.comment, ''), 'denied by the approver');
        ELSIF v_ticket.state <> 'pending' THEN
            v_outcome := 'deny';
            v_reason := 'approval_expired';
            v_message := format('the approval ticket is %s', v_ticket.state);
        END IF;
    END IF;

    IF v_outcome = 'allow' THEN
        FOR v_budget IN SELECT r.scope_kind, r.scope_id, r.unit, r.amount
            FROM ROWS FROM (jsonb_to_recordset(c -> 'reserve') AS (scope_kind text, scope_id uuid, unit text, amount numeric))
                WITH ORDINALITY AS r (scope_kind, scope_id, unit, amount, ord) ORDER BY r.ord
        LOOP
            UPDATE budgets SET reserved = reserved + v_budget.amount
                WHERE tenant_id = v_tenant AND scope_kind = v_budget.scope_kind AND scope_id = v_budget.scope_id
                  AND unit = v_budget.unit AND spent + reserved + v_budget.amount <= limit_amount;
            IF NOT FOUND THEN
                v_refused := v_budget;
                EXIT;
            END IF;
            v_reserved := v_reserved + 1;
        END LOOP;
        IF v_refused IS NOT NULL THEN
            UPDATE budgets AS b SET reserved = b.reserved - r.amount
                FROM ROWS FROM (jsonb_to_recordset(c -> 'reserve') AS (scope_kind text, scope_id uuid, unit text, amount numeric))
                WITH ORDINALITY AS r (scope_kind, scope_id, unit, amount, ord)
                WHERE r.ord <= v_reserved AND b.tenant_id = v_tenant AND b.scope_kind = r.scope_kind
                  AND b.scope_id = r.scope_id AND b.unit = r.unit;
            SELECT jsonb_build_object('scope', b.scope_kind, 'scope_id', b.scope_id, 'unit', b.unit,
                    'limit', trim_scale(b.limit_amount)::text, 'spent', trim_scale(b.spent)::text,
                    'reserved', trim_scale(b.reserved)::text, 'needed', trim_scale(v_refused.amount)::text)
                INTO v_answer FROM budgets AS b
                WHERE b.tenant_id = v_tenant AND b.scope_kind = v_refused.scope_kind
                  AND b.scope_id = v_refused.scope_id AND b.unit = v_refused.unit;
            v_outcome := 'deny';
            v_reason := CASE WHEN v_answer IS NULL THEN 'budget_missing' ELSE 'budget_exceeded' END;
            v_message := CASE WHEN v_answer IS NULL
                THEN format('no %s budget in %s is set for this %s', v_refused.scope_kind, v_refused.unit, v_refused.scope_kind)
                ELSE format('the %s budget is too small: limit %s %s, spent %s, reserved %s, needed %s',
                    v_refused.scope_kind, v_answer ->> 'limit', v_refused.unit, v_answer ->> 'spent',
                    v_answer ->> 'reserved', v_answer ->> 'needed') END;
            v_answer := jsonb_build_object('limit', COALESCE(v_answer, jsonb_build_object(
                'scope', v_refused.scope_kind, 'scope_id', v_refused.scope_id, 'unit', v_refused.unit)));
        END IF;
    END IF;

    v_answer := COALESCE(v_answer, '{}'::jsonb) || jsonb_build_object(
        'reason', v_reason, 'message', v_message, 'replayed', false, 'halt', v_halt);

    v_state := CASE v_outcome WHEN 'allow' THEN 'granted' WHEN 'ask' THEN 'awaiting_approval'
                              WHEN 'steer' THEN 'steered' ELSE 'denied' END;
    INSERT INTO run_steps AS s (tenant_id, run_id, step_index, attempt, step_id, step_key, capability, resource,
            arguments, arguments_digest, executor_kind, state, decision, grant_id, ticket_id, error)
        VALUES (v_tenant, v_run_id, v_step, v_attempt, c ->> 'step_id', c ->> 'step_key', c ->> 'capability',
            c ->> 'resource', c -> 'arguments', c ->> 'digest', c ->> 'executor_kind', v_state, c -> 'decision',
            CASE WHEN v_state = 'granted' THEN (c #>> '{grant,id}')::uuid END,
            COALESCE(v_ticket.id, CASE WHEN v_state = 'awaiting_approval' THEN (c #>> '{ticket,id}')::uuid END),
            CASE WHEN v_state IN ('denied', 'steered') THEN v_answer END)
        ON CONFLICT (tenant_id, run_id, step_index, attempt) DO UPDATE
            SET state = EXCLUDED.state, decision = EXCLUDED.decision, grant_id = EXCLUDED.grant_id, error = EXCLUDED.error,
                ticket_id = COALESCE(s.ticket_id, EXCLUDED.ticket_id), capability = EXCLUDED.capability,
                resource = EXCLUDED.resource, arguments = EXCLUDED.arguments, arguments_digest = EXCLUDED.arguments_digest
            WHERE s.state = 'awaiting_approval' AND s.step_id = EXCLUDED.step_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
            'attempt %s of step %s of run %s was already decided', v_attempt, v_step, v_run_id);
    END IF;

    IF v_state = 'granted' THEN
        v_expires := clock_timestamp() + make_interval(secs => (c #>> '{grant,seconds}')::double precision);
        INSERT INTO grants (tenant_id, id, run_id, step_index, attempt, digest, policy_digest, span_id, fencing_token,
                secret_hash, expires_at)
            VALUES (v_tenant, (c #>> '{grant,id}')::uuid, v_run_id, v_step, v_attempt, c ->> 'digest',
                c ->> 'policy_digest', c #>> '{grant,span_id}', (c ->> 'fencing_token')::bigint,
                decode(c #>> '{grant,secret_hash}', 'hex'), v_expires);
        INSERT INTO reservations (tenant_id, grant_id, scope_kind, scope_id, unit, amount)
            SELECT v_tenant, (c #>> '{grant,id}')::uuid, r.scope_kind, r.scope_id, r.unit, r.amount
            FROM jsonb_to_recordset(c -> 'reserve') AS r (scope_kind text, scope_id uuid, unit text, amount numeric);
        IF v_ticket.id IS NOT NULL THEN
            UPDATE approval_tickets SET consumed_at = clock_timestamp() WHERE tenant_id = v_tenant AND id = v_ticket.id;
        END IF;
        v_answer := v_answer || jsonb_build_object('status', 'granted', 'grant_id', c #> '{grant,id}',
            'span_id', c #> '{grant,span_id}', 'expires_at', v_expires, 'ticket_id', v_ticket.id);
        v_kind := 'step_granted';
    ELSIF v_state = 'awaiting_approval' THEN
        IF v_ticket.id IS NULL THEN
            INSERT INTO approval_tickets (tenant_id, id, run_id, step_index, attempt, capability, resource, arguments,
                    digest, policy_digest, tier, risk, requested_by, deadline)
                VALUES (v_tenant, (c #>> '{ticket,id}')::uuid, v_run_id, v_step, v_attempt, c ->> 'capability',
                    c ->> 'resource', c -> 'arguments', c ->> 'digest', c ->> 'policy_digest', c #>> '{decision,tier}',
                    c #>> '{decision,risk}', (c ->> 'requester')::uuid,
                    clock_timestamp() + make_interval(secs => (c #>> '{ticket,seconds}')::double precision))
                RETURNING * INTO v_ticket;
        END IF;
        UPDATE run_states SET state = 'awaiting_approval', reason = 'approval_required', message = v_message,
                lease_owner = NULL, lease_expires_at = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_run_id;
        v_answer := v_answer || jsonb_build_object('status', 'pending', 'ticket_id', v_ticket.id,
            'deadline', v_ticket.deadline);
        v_kind := 'approval_requested';
    ELSE
        v_answer := v_answer || jsonb_build_object('status', v_state, 'guidance', c #> '{decision,guidance}');
        v_kind := 'step_' || v_state;
    END IF;

    PERFORM engine_append_event_v1(v_tenant, 'run/' || v_run_id, v_kind, c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('step', v_step, 'step_id', c -> 'step_id', 'attempt', v_attempt, 'capability', c -> 'capability',
            'resource', c -> 'resource', 'digest', c -> 'digest', 'policy_digest', c -> 'policy_digest',
            'decision', c -> 'decision', 'answer', v_answer - 'replayed', 'reserved', CASE WHEN v_state = 'granted' THEN c -> 'reserve' END)));
    UPDATE idempotency_records SET result = v_answer
        WHERE tenant_id = v_tenant AND operation = 'admit' AND command_id = v_command;
    RETURN v_answer;
END
$$;
